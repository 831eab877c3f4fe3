// A report stays on its node: after the job, after a change of tabs, after a reload of the page.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const EVENT = "frugal.report", ROUTE = "/frugal/reports", NAME = "frugal_report";
const LINE = 15, MOST_LINES = 7, PADDING = 14; // px; a line more, for one that wraps
const STYLE = `box-sizing: border-box; height: 100%; overflow: auto;
    padding: 6px 8px; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
    font: 11px/${LINE}px system-ui, sans-serif; user-select: text; cursor: text;
    color: var(--input-text); background: var(--comfy-input-bg)`;

const root = () => app.rootGraph ?? app.graph;

// "7:3" is node 3 of the subgraph that is node 7.
function find(id) {
    let graph = root(), node;
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
        graph = node?.subgraph;
    }
    return node;
}

function widgetOf(node) {
    const there = node.widgets?.find((widget) => widget.name === NAME);
    if (there) return there;
    const element = document.createElement("div");
    element.className = "frugal-report";
    element.style.cssText = STYLE;
    element.dataset.captureWheel = "true";
    for (const kind of ["pointerdown", "pointermove", "pointerup"])
        element.addEventListener(kind, (event) => event.stopPropagation());
    const widget = node.addDOMWidget(NAME, NAME, element, {
        serialize: false,
        getMinHeight: () => parseInt(element.style.minHeight),
        getValue: () => element.innerText,
    });
    widget.serialize = false;
    return widget;
}

function show(id, text) {
    const node = find(id);
    if (!node?.type?.startsWith("Frugal")) return;
    const [verdict, ...rest] = text.split("\n");
    const first = document.createElement("b");
    first.textContent = verdict;
    const { element } = widgetOf(node);
    element.style.minHeight = `${PADDING + LINE * Math.min(rest.length + 2, MOST_LINES)}px`;
    element.replaceChildren(first, rest.map((line) => `\n${line}`).join(""));
    node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
    name: "comfyuifrugal.reports",
    setup() {
        api.addEventListener(EVENT, ({ detail }) => {
            if (detail.workflow === root()?.id) show(detail.node, detail.text);
        });
    },
    async afterConfigureGraph() {
        const id = root()?.id;
        if (!id) return;
        const answer = await api.fetchApi(`${ROUTE}?workflow=${encodeURIComponent(id)}`);
        if (!answer.ok || root()?.id !== id) return;
        for (const [node, text] of Object.entries(await answer.json())) show(node, text);
    },
});
