// Bodies and frames. Everything from outside is text: nothing here makes HTML of it.

const MAX_HEX = 65536, MAX_TREE_DEPTH = 100, LINE = 16

export function element(name, attributes = {}, ...children) {
    const made = document.createElement(name)
    for (const [key, value] of Object.entries(attributes)) {
        if (key === "class") made.className = value
        else if (key.startsWith("on")) made.addEventListener(key.slice(2), value)
        else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value === true ? "" : value)
    }
    made.append(...children.filter(child => child !== null && child !== undefined && child !== ""))
    return made
}

export function sizeOf(bytes) {
    if (bytes < 1000) return `${bytes} B`
    const units = ["kB", "MB", "GB", "TB"]
    let number = bytes / 1000, unit = 0
    while (number >= 999.5 && unit < units.length - 1) { number /= 1000; unit++ }
    return `${number < 9.95 ? number.toFixed(1) : number.toFixed(0)} ${units[unit]}`
}

export function durationOf(seconds) {
    if (seconds === null) return "…"
    if (seconds < 0.0095) return `${(seconds * 1000).toFixed(1)} ms`
    if (seconds < 0.9995) return `${(seconds * 1000).toFixed(0)} ms`
    return seconds < 99.95 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)} min`
}

export function bytesOf(message) {
    if (message.data) return Uint8Array.from(atob(message.data), letter => letter.charCodeAt(0))
    return new TextEncoder().encode(message.text ?? "")
}

const VIEWS = {
    Tree: message => element("div", { class: "tree" }, treeOf(null, JSON.parse(message.text), 0)),
    Pretty: message => element("pre", {}, JSON.stringify(JSON.parse(message.text), null, 2)),
    Form: message => fieldsOf([...new URLSearchParams(message.text.trim())]),
    Image: imageOf,
    Text: message => element("pre", {}, message.text),
    Hex: message => element("pre", { class: "hex" }, hexOf(bytesOf(message))),
}
const CHOICES = {
    json: ["Tree", "Pretty", "Text", "Hex"], form: ["Form", "Text", "Hex"], image: ["Image", "Hex"], text: ["Text", "Hex"],
    binary: ["Hex"], empty: [],
}

const chosen = new Map() // by kind: the view that the user has chosen

export function bodyOf(message, link) {
    const views = CHOICES[message.kind].concat(message.kind === "image" && message.text ? ["Text"] : [])
    const size = message.is_open && message.size ? `${sizeOf(message.size)} so far` : sizeOf(message.size)
    const bar = element("div", { class: "views", role: "group", "aria-label": "Views of the body" })
    const place = element("div", { class: "body", tabindex: "0" })
    const show = view => {
        for (const button of bar.querySelectorAll("button")) button.setAttribute("aria-pressed", button.textContent === view)
        let shown
        try { shown = VIEWS[view](message) } catch (error) { shown = element("p", { class: "hint" }, `${error.message}`) }
        place.replaceChildren(shown)
    }
    for (const view of views)
        bar.append(element("button", { type: "button", onclick: () => { chosen.set(message.kind, view); show(view) } }, view))
    bar.append(element("span", { class: "hint" }, message.size ? [size, message.note].filter(Boolean).join(" · ") : "no body"))
    if (views.length) bar.append(element("a", { href: link, download: "" }, "Save"))
    if (views.length) show(views.includes(chosen.get(message.kind)) ? chosen.get(message.kind) : views[0])
    return views.length ? [bar, place] : [bar]
}

export function fieldsOf(pairs) {
    const rows = pairs.map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value)))
    return element("table", { class: "fields" }, element("tbody", {}, ...rows))
}

function imageOf(message) {
    const type = message.type.split(";")[0].trim()
    const url = URL.createObjectURL(new Blob([bytesOf(message)], { type }))
    const forget = () => URL.revokeObjectURL(url)
    return element("img", { src: url, alt: "the body, an image", onload: forget, onerror: forget })
}

// Children are made when they are first opened.
function treeOf(key, value, depth) {
    const label = key === null ? "" : element("span", { class: "key" }, `${key}: `)
    if (value === null || typeof value !== "object") {
        const kind = typeof value === "string" ? "string" : "literal"
        const text = kind === "string" && value.includes("\n") ? `\n${value}` : JSON.stringify(value)
        return element("div", { class: "leaf" }, label, element("span", { class: kind }, text))
    }
    const entries = Object.entries(value), isList = Array.isArray(value)
    const hint = element("span", { class: "hint" }, isList ? `[${entries.length}]` : `{${entries.length}}`)
    if (!entries.length || depth > MAX_TREE_DEPTH) return element("div", { class: "leaf" }, label, hint)
    const inside = element("div"), tree = element("details", {}, element("summary", {}, label, hint), inside)
    const fill = () => {
        if (tree.open && !inside.hasChildNodes()) inside.append(...entries.map(([name, item]) => treeOf(name, item, depth + 1)))
    }
    tree.addEventListener("toggle", fill)
    tree.open = depth < 3 && entries.length <= 20
    fill()
    return tree
}

export function hexOf(bytes) {
    const lines = []
    for (let start = 0; start < Math.min(bytes.length, MAX_HEX); start += LINE) {
        const part = [...bytes.subarray(start, start + LINE)]
        const hex = part.map((byte, index) => byte.toString(16).padStart(2, "0") + (index === 7 ? " " : "")).join(" ")
        const text = part.map(byte => byte > 31 && byte < 127 ? String.fromCharCode(byte) : "·").join("")
        lines.push(`${start.toString(16).padStart(6, "0")}  ${hex.padEnd(LINE * 3)}  ${text}`)
    }
    if (bytes.length > MAX_HEX) lines.push(`… the first ${MAX_HEX} of ${bytes.length} bytes`)
    return lines.join("\n")
}

export function framesOf(exchange) {
    const items = exchange.shown_frames.map(frame => {
        const name = frame.up ? "from the visitor" : "from the local server"
        const text = frame.text ?? (frame.compressed ? "compressed, not decoded\n" : "") + hexOf(bytesOf(frame))
        const cut = frame.kept < frame.size && !frame.compressed && frame.text === null ? "cut" : ""
        return element("li", {},
            element("span", { class: frame.up ? "up" : "down", title: name, role: "img", "aria-label": name }, frame.up ? "↑" : "↓"),
            element("span", { class: "hint" }, frame.kind + (frame.final ? "" : " …")),
            element("pre", {}, text, cut && element("span", { class: "hint" }, " …")),
            element("span", { class: "hint number" }, sizeOf(frame.size)),
            element("span", { class: "hint number" }, timeOf(frame.time)))
    })
    return element("ol", { class: "frames" }, ...items)
}

export function timeOf(seconds) {
    return new Date(seconds * 1000).toLocaleTimeString([], { hour12: false })
}
