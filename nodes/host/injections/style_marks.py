"""Names by which parts of Style Injection and the Multi-Style Guider know each other."""

from __future__ import annotations

STYLE_INJECTION = "Style Injection"  # the node's mark on a MODEL
STYLE_ROWS = "pastiche_style_rows"  # in transformer_options: the style number of every batch row
STYLE_PLAN = "pastiche_style_plan"  # there too: (style number, caller's condition number) of each number in cond_or_uncond
