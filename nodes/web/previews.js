// A node that writes a video shows live previews while it works and the video afterwards. The page
// keeps the last preview and shows it in the video's place, so it is dropped here.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const STILLS = ["$$canvas-image-preview", "$$comfy_animation_preview"], PLAYER = "video-preview";

// The page has no other way to it.
function store() {
    const page = document.getElementById("vue-app")?.__vue_app__;
    return page?.config.globalProperties.$pinia?._s.get("nodeOutput");
}

const isVideo = (output) => Boolean(output?.animated?.some(Boolean));
const isRoot = (graph) => graph === (app.rootGraph ?? app.graph);
const locator = (node) => (isRoot(node.graph) ? String(node.id) : `${node.graph?.id}:${node.id}`);

function removeWidgets(node, names) {
    for (const name of names) {
        node.widgets?.find((each) => each.name === name)?.onRemove?.();
        const place = node.widgets?.findIndex((each) => each.name === name) ?? -1;
        if (place >= 0) node.widgets.splice(place, 1);
    }
}

function endPreview(node) {
    store()?.revokePreviewsByLocatorId?.(locator(node));
    node.imgs = node.preview = node.images = undefined;
    removeWidgets(node, STILLS);
    node.setDirtyCanvas?.(true, true);
}

// Else the page takes the next run's previews for a video.
function endVideo(node) {
    store()?.removeNodeOutputs?.(node.id);
    node.videoContainer = node.previewMediaType = node.images = undefined;
    removeWidgets(node, [PLAYER]);
}

app.registerExtension({
    name: "comfyuifrugal.previews",
    beforeRegisterNodeDef(type, data) {
        if (!data.name.startsWith("Frugal")) return;
        const { onExecuted, onDrawBackground } = type.prototype;
        type.prototype.onExecuted = function (output) {
            onExecuted?.apply(this, arguments);
            this.frugalVideo = isVideo(output);
            if (this.frugalVideo) endPreview(this);
        };
        type.prototype.onDrawBackground = function () {
            // A preview that was still being loaded when the video came.
            if (this.frugalVideo) this.imgs = undefined;
            const player = this.widgets?.find((each) => each.name === PLAYER)?.element.firstChild;
            if (player !== this.frugalPlayer)
                // The node grows around it in the next picture, which nothing else asks for.
                requestAnimationFrame(() => this.setDirtyCanvas(true, true));
            this.frugalPlayer = player;
            return onDrawBackground?.apply(this, arguments);
        };
    },
    setup() {
        api.addEventListener("b_preview_with_metadata", ({ detail }) => {
            const node = (app.rootGraph ?? app.graph).getNodeById(Number(detail.displayNodeId));
            if (!node?.frugalVideo) return;
            node.frugalVideo = false;
            endVideo(node);
        });
    },
});
