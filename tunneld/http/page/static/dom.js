// Elements. Text reaches the page through text nodes only, never as markup: names come from strangers.

export const find = id => document.getElementById(id)

// make("button", { class: "quiet", onclick: run, disabled: true }, "Kick")
export function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag)
    for (const [name, value] of Object.entries(properties)) {
        if (typeof value === "string") node.setAttribute(name, value)
        else node[name] = value
    }
    node.append(...children.filter(child => child !== null && child !== undefined))
    return node
}

export function setText(node, text) {
    if (node.textContent !== text) node.textContent = text
}

// A link for addresses that a browser can open, else the text: an address is never trusted to be one.
export function address(text) {
    if (!/^https?:\/\//.test(text)) return make("span", {}, text)
    return make("a", { href: text, target: "_blank", rel: "noopener noreferrer" }, text)
}

// <dl> of [term, content, class]; contents are texts or nodes, and null leaves one out.
export function fill(list, entries) {
    const wanted = entries.filter(([, content]) => content !== null && content !== undefined && content !== "")
    while (list.children.length > wanted.length) list.lastChild.remove()
    while (list.children.length < wanted.length) list.append(make("div", {}, make("dt"), make("dd")))
    wanted.forEach(([term, content, kind = ""], index) => {
        const [name, value] = list.children[index].children
        list.children[index].className = kind
        setText(name, term)
        if (typeof content === "string") setText(value, content)
        else if (value.firstChild !== content) value.replaceChildren(content)
    })
}
