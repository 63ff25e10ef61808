// What our widgets say, in the language of ComfyUI's settings: locales/ is for nodes, and has no place for widgets.
import { app } from "../../scripts/app.js";

const CHINESE = {
  "Undo (Ctrl+Z)": "撤销 (Ctrl+Z)",
  "Redo (Ctrl+Shift+Z)": "重做 (Ctrl+Shift+Z)",
  "Delete the selected mark, or the last (Delete)": "删除选中的标记，未选中时删除最后一个 (Delete)",
  "Clear all marks": "清除所有标记",
  "Fit": "适应",
  "Fit the picture (0)": "使图片适应窗口 (0)",
  "Show or hide the mask of the last run": "显示或隐藏上次运行的遮罩",
  "Large view (L); again or Escape closes it": "大视图 (L)；再按一次或 Escape 关闭",
  "Left click: take. Right click or Shift: remove. Drag: box; its edges and corners resize it, the middle of a selected one moves it. Alt+click a mark or Delete: delete it. Wheel: zoom, once clicked. Middle or Ctrl+drag: pan. Keys: arrows move the cross, Enter takes, N removes, B starts and ends a box, [ and ] select a mark, L opens the large view.":
    "左键：选取。右键或 Shift：排除。拖动：画框；拖边或角可调整大小，拖选中框的中心可移动。Alt+单击标记或 Delete：删除。滚轮：缩放（先单击图片）。中键或 Ctrl+拖动：平移。键盘：方向键移动十字，Enter 选取，N 排除，B 开始和结束画框，[ 和 ] 选择标记，L 打开大视图。",
  "Point and box picker. {help}": "点与框选取器。{help}",
  "{n} point": "{n} 个点",
  "{n} points": "{n} 个点",
  "{n} box": "{n} 个框",
  "{n} boxes": "{n} 个框",
  "{n} object found": "找到 {n} 个物体",
  "{n} objects found": "找到 {n} 个物体",
  "no object at the hollow point": "空心点处没有物体",
  "no object at {n} hollow points": "{n} 个空心点处没有物体",
  "points or boxes come from a link": "点或框来自连线",
  "size as loaded": "加载时的大小",
  "Not connected: the marks are kept.": "未连接：标记会保留。",
  "Connect an image. Load Image shows at once, other nodes after a run.": "请连接图像。加载图像会立即显示，其他节点在运行后显示。",
  "The picture cannot be shown; run the workflow once.": "无法显示图片；请先运行一次工作流。",
  "Run, then drag here: left before, right after": "运行后在此拖动：左侧为之前，右侧为之后",
  "Use my own picture": "使用我自己的图片",
  "only this model": "仅此模型",
  "Refresh the list": "刷新列表",
  "What saved styles may take altogether; empty is no limit. Saving beyond it is refused, nothing is deleted by itself.":
    "已保存的风格总共可占用的空间；留空为不限。超出时拒绝保存，不会自动删除任何文件。",
  "Limit (MB)": "上限 (MB)",
  "Styles": "风格",
  "Delete": "删除",
  "Delete for good": "永久删除",
  "Keep": "保留",
  "{size} saved": "已保存 {size}",
  "The model of the last run: {model}": "上次运行的模型：{model}",
  "The model in hand is known after a run.": "运行一次后才能得知当前模型。",
  "cannot be read": "无法读取",
  "any model": "任何模型",
  "Delete {name} ({size})? It cannot be brought back.": "删除 {name}（{size}）？无法恢复。",
  "made with {theirs}; the model of the last run is {ours}": "由 {theirs} 制作；上次运行的模型是 {ours}",
  "The list cannot be read: {why}": "无法读取列表：{why}",
  "Waiting for the queue ...": "正在等待队列……",
};

/** `text` in the user's language, with {name} replaced by values[name]. */
export function say(text, values = {}) {
  const language = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
  const said = language === "zh" ? (CHINESE[text] ?? text) : text;
  return said.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
