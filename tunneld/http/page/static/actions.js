// What changes something: asks first where it disconnects anybody, and says which command does the same.

import { call } from "./api.js"
import { find, make } from "./dom.js"
import { command } from "./format.js"

const NOTE_TIME = 12_000  // ms

// Execute a verb. `words` are those of the command, where they are not the verb and its arguments.
export async function act(verb, args, words = [verb, ...args]) {
    try {
        note((await call(verb, ...args)).text, command(...words))
        return true
    } catch (error) {
        note(error.message, command(...words), "problem")
        return false
    }
}

export function note(text, line = "", kind = "done") {
    const close = make("button", { type: "button", class: "quiet", "aria-label": "Dismiss", onclick: () => entry.remove() }, "×")
    const entry = make("div", { class: `note ${kind}` }, make("p", {}, text), line ? make("code", {}, line) : null, close)
    find("notes").append(entry)
    while (find("notes").children.length > 3) find("notes").firstChild.remove()
    setTimeout(() => entry.remove(), NOTE_TIME)
}

// A dialog. `fields` are elements above the buttons, `line` is called for the command whenever one of them changes.
// Resolves to whether the button `button` was pressed.
export function ask({ title, text, line, button, fields = [], danger = true }) {
    const dialog = find("dialog"), shown = make("code", { class: "command" })
    const refresh = () => { shown.textContent = line() }
    const confirm = make("button", { class: danger ? "danger" : "main", value: "yes" }, button)
    const copy = make("button", { type: "button", class: "quiet" }, "Copy")
    copy.onclick = () => navigator.clipboard?.writeText(shown.textContent).then(() => { copy.textContent = "Copied" })
    const form = make("form", { method: "dialog" },
        make("h2", { id: "dialog-title" }, title), make("p", {}, text), ...fields,
        make("p", { class: "same" }, "The same in a terminal:"), make("div", { class: "line" }, shown, copy),
        make("div", { class: "buttons" }, make("button", { value: "no", class: "quiet", autofocus: true }, "Cancel"), confirm))
    form.oninput = refresh
    refresh()
    dialog.replaceChildren(form)
    dialog.returnValue = ""
    dialog.showModal()
    return new Promise(resolve => {
        dialog.onclose = () => resolve(dialog.returnValue === "yes")
    })
}

export async function kick(tunnel, visitor) {
    const args = [tunnel.id, visitor]
    const text = `Cuts the connection of ${visitor} now. It may come back at once; a ban keeps it out.`
    if (await ask({ title: "Kick this visitor?", text, line: () => command("kick", ...args), button: "Kick" })) {
        await act("kick", args)
    }
}

const TIMES = { "10m": "10 minutes", "1h": "1 hour", "1d": "1 day", "7d": "7 days", "30d": "30 days" }
const SECONDS = { m: 60, h: 3600, d: 86400 }

export async function ban(host) {
    const network = make("input", { id: "ban-network", value: host, required: true, spellcheck: false, autocomplete: "off" })
    const times = Object.entries(TIMES).map(([value, text]) => make("option", { value, selected: value === "1h" }, text))
    const time = make("select", { id: "ban-time" }, ...times)
    const fields = [make("label", { for: "ban-network" }, "Address or network"), network, make("label", { for: "ban-time" }, "For"), time]
    const line = () => command("ban", network.value.trim() || "NETWORK", "--for", time.value)
    const text = "Disconnects its visitors from all tunnels, and refuses new ones until the time is over."
    if (await ask({ title: "Ban an address", text, line, button: "Ban", fields })) {
        const where = network.value.trim(), seconds = parseInt(time.value, 10) * SECONDS[time.value.at(-1)]
        await act("ban", [where, String(seconds)], ["ban", where, "--for", time.value])
    }
}

export const unban = network => act("unban", [network])
export const pardon = where => act("pardon", [where])

export async function drain(tunnel) {
    const args = [tunnel.id], title = `Drain ${tunnel.name ?? tunnel.id}?`
    const text = `No new visitors; it closes when the last of ${tunnel.visitors} has left. Its agent does not open it again.`
    if (await ask({ title, text, line: () => command("drain", ...args), button: "Drain" })) await act("drain", args)
}

export async function close(tunnel) {
    const keep = make("input", { id: "keep", type: "checkbox" })
    const words = () => ["close", tunnel.id, ...(keep.checked ? ["--keep"] : [])]
    const fields = [make("label", { class: "check" }, keep, "Keep its address, and let its agent open it again")]
    const text = `Cuts the connections of ${tunnel.visitors} visitors now.`
    const title = `Close ${tunnel.name ?? tunnel.id}?`
    if (await ask({ title, text, line: () => command(...words()), button: "Close", fields })) {
        await act("close", [tunnel.id, ...(keep.checked ? ["keep"] : [])], words())
    }
}
