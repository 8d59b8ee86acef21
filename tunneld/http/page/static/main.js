// The page: which section is shown, the line of facts, and the keyboard.

import { logOut } from "./api.js"
import { fill, find, make, setText } from "./dom.js"
import { Events } from "./events.js"
import { duration, number, rate } from "./format.js"
import { live, start, watch } from "./live.js"
import { bans, certificates, credentials } from "./records.js"
import { OneTunnel, Tunnels } from "./tunnels.js"

const SECTIONS = { tunnels: () => new Tunnels(), events: () => new Events(), bans, certificates, credentials }
const STATES = { live: "live", waiting: "connecting…", paused: "paused" }
const KEYS = [
    ["1 – 5", "the sections"],
    ["/", "filter"],
    ["j  k", "next and previous row"],
    ["Enter", "open the tunnel, press the button"],
    ["Tab", "next link or button; in a row: Kick, Ban"],
    ["Escape", "close a dialog, clear the filter, go back to all tunnels"],
    ["?", "this list"],
]

const made = {}  // sections by their address, which keep their filter and order
let shown = null

function show() {
    const [section, tunnel] = decodeURIComponent(location.hash.slice(1)).split("/")
    if (section === "main") return
    const name = section in SECTIONS ? section : "tunnels"
    const one = name === "tunnels" && tunnel ? `tunnels/${tunnel}` : name
    if (one.includes("/")) made[one] ??= new OneTunnel(tunnel)
    else made[one] ??= SECTIONS[name]()
    for (const address of Object.keys(made)) if (address.includes("/") && address !== one) delete made[address]
    shown = made[one]
    find("main").replaceChildren(shown.node)
    for (const link of find("sections").children) {
        if (link.hash === `#${name}`) link.setAttribute("aria-current", "page")
        else link.removeAttribute("aria-current")
    }
    watch(name === "tunnels" && tunnel ? tunnel : "")
    update()
}

function update() {
    const { hello, state, status } = live
    setText(find("link"), STATES[state])
    find("link").dataset.state = state
    setText(find("who"), hello.role ? `${hello.name || "this machine"} · ${hello.role}` : "")
    find("logout").hidden = !hello.session
    for (const link of document.querySelectorAll("nav .all")) link.hidden = hello.role === "user"
    setText(find("count-tunnels"), number(live.total))
    const tunnels = [...live.tunnels.values()], sum = key => tunnels.reduce((total, tunnel) => total + tunnel[key], 0)
    fill(find("facts"), [
        ["Tunnels", number(live.total)],
        ["Visitors", number(status?.visitors ?? sum("visitors"))],
        ["Up", rate(sum("rate_up"))],
        ["Down", rate(sum("rate_down"))],
        ["Refused", number(sum("refused"))],
        ["Blocked", status ? number(status.penalised) : null, "big"],
        ["Descriptors", status ? `${number(status.descriptors)} of ${number(status.max_descriptors)}` : null, "big"],
        ["Running for", status ? duration(status.uptime) : null],
        ["Version", hello.version, "big"],
        ["State", status && status.phase !== "ready" ? status.phase : null],
    ])
    if (hello.role) shown.update()
}

function showKeys() {
    const list = make("dl", { class: "keys" }, ...KEYS.map(([key, does]) => make("div", {}, make("dt", {}, make("kbd", {}, key)), make("dd", {}, does))))
    const close = make("button", { class: "main", value: "no", autofocus: true }, "Close")
    find("dialog").replaceChildren(make("form", { method: "dialog" }, make("h2", { id: "dialog-title" }, "Keys"), list, make("div", { class: "buttons" }, close)))
    find("dialog").onclose = null
    find("dialog").showModal()
}

function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || find("dialog").open) return
    const typing = event.target.matches("input, select, textarea")
    if (event.key === "Escape") {
        if (shown.filter?.value) {
            shown.filter.value = ""
            shown.update()
        } else if (!typing && location.hash.includes("/")) {
            location.hash = "#tunnels"
        }
        event.target.blur()
    } else if (!typing && does(event.key)) {
        event.preventDefault()
    }
}

function does(key) {
    const links = [...find("sections").children].filter(link => !link.hidden)
    if (links[key - 1]) links[key - 1].click()
    else if (key === "/" && shown.filter) shown.filter.focus()
    else if (key === "?") showKeys()
    else if (key === "j" || key === "k") (shown.table ?? shown.tables[0].table).step(key === "j" ? 1 : -1)
    else return false
    return true
}

setText(find("host"), location.host)
find("keys").onclick = showKeys
find("logout").onclick = logOut
find("skip").onclick = event => { event.preventDefault(); find("main").focus() }
addEventListener("hashchange", show)
addEventListener("keydown", onKey)
show()
start(update)
setInterval(() => live.state === "live" && update(), 1000)  // times go on between snapshots
