"""Many pictures through one or many ComfyUIs, for tools/restyle.py.

    pairs      which picture with which style, and what the result is called
    recipe     the workflow as a prompt for one pair, so that ComfyUI finds again what it has computed
    members    a ComfyUI that takes part: attached to, or started
    jobs       the list that the members take from
    crew       a thread for each member
    results    the output folder: finished names, journal, contact sheets
    on_ray     members on a Ray cluster
"""


class UserError(Exception):
    """A sentence for the user."""
