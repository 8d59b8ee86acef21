// The section of tunnels: all of them, or one with its visitors.

import { ban, close, drain, kick } from "./actions.js"
import { address, fill, find, make, setText } from "./dom.js"
import { duration, number, plural, rate, refusals, size } from "./format.js"
import { live } from "./live.js"
import { eventTable } from "./events.js"
import { Table } from "./table.js"

const age = tunnel => Date.now() / 1000 - tunnel.since
const owner = tunnel => tunnel.owner.split("@")[0]
const publicAddress = tunnel => tunnel.private ?? tunnel.url ?? tunnel.client
const SHOWN = { bandwidth: rate, quota: size }
const limit = (key, value) => `${key.replaceAll("_", " ")} ${(SHOWN[key] ?? String)(value)}`
const mayChange = () => live.hello.role !== "viewer"

function phase(row) {
    const node = make("span", { class: "phase" })
    node.update = tunnel => {
        setText(node, tunnel.certificate ? "no certificate" : tunnel.phase)
        node.dataset.phase = tunnel.certificate ? "problem" : tunnel.phase
        node.title = tunnel.certificate ?? ""
    }
    node.update(row)
    return node
}

export class Tunnels {
    constructor() {
        this.filter = make("input", { id: "filter", type: "search", placeholder: "name, address, owner", autocomplete: "off", spellcheck: false, oninput: () => this.update() })
        this.count = make("p", { class: "count", role: "status" })
        this.empty = make("div", { class: "empty" })
        this.table = new Table({
            caption: "Open tunnels",
            key: tunnel => tunnel.id,
            columns: [
                { title: "Tunnel", class: "name", sort: tunnel => tunnel.name ?? tunnel.id, node: get => make("a", { href: `#tunnels/${get().id}` }, get().name ?? get().id) },
                { title: "Public address", class: "address", sort: publicAddress, text: publicAddress },
                { title: "State", class: "state", sort: tunnel => tunnel.phase, node: get => phase(get()) },
                { title: "Owner", class: "wide", sort: owner, text: owner },
                { title: "Backend", class: "wider", sort: tunnel => tunnel.backend, text: tunnel => tunnel.backend },
                { title: "Visitors", number: true, sort: tunnel => tunnel.visitors, text: tunnel => number(tunnel.visitors) },
                { title: "Up", number: true, sort: tunnel => tunnel.rate_up, text: tunnel => rate(tunnel.rate_up) },
                { title: "Down", number: true, sort: tunnel => tunnel.rate_down, text: tunnel => rate(tunnel.rate_down) },
                { title: "Volume", number: true, class: "wide", sort: tunnel => tunnel.up + tunnel.down, text: tunnel => size(tunnel.up + tunnel.down) },
                { title: "Refused", number: true, class: "wide", sort: tunnel => tunnel.refused, text: tunnel => tunnel.refused ? number(tunnel.refused) : "–" },
                { title: "Open for", number: true, class: "wider", sort: tunnel => -tunnel.since, text: tunnel => duration(age(tunnel)) },
            ],
        })
        this.node = make("section", { "aria-labelledby": "title-tunnels" },
            make("div", { class: "tools" }, make("h2", { id: "title-tunnels" }, "Tunnels"), make("label", { for: "filter", class: "unseen" }, "Filter tunnels"), this.filter, this.count),
            this.table.node, this.empty)
    }

    update() {
        const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean)
        const all = [...live.tunnels.values()]
        const found = all.filter(tunnel => {
            const text = [tunnel.id, tunnel.name, tunnel.url ?? tunnel.client, tunnel.host, tunnel.private, tunnel.owner, tunnel.backend, tunnel.phase].join(" ").toLowerCase()
            return words.every(word => text.includes(word))
        })
        this.table.update(found)
        setText(this.count, found.length === all.length ? "" : `${found.length} of ${plural(all.length, "tunnel")}`)
        this.empty.hidden = found.length > 0 || live.state === "waiting"
        if (!this.empty.hidden) {
            const none = make("p", {}, all.length ? "No tunnel has all of these words." : "No open tunnels.")
            this.empty.replaceChildren(none, ...(all.length ? [] : [make("p", {}, "Open one from where a server runs: ", make("code", {}, "tunnel expose 8000"))]))
        }
    }
}

export class OneTunnel {
    constructor(id) {
        this.id = id
        this.title = make("h2", { id: "title-tunnel", tabindex: "-1" }, id)
        this.phase = phase({ phase: "" })
        this.facts = make("dl", { class: "facts inner" })
        this.drain = make("button", { type: "button", onclick: () => drain(this.tunnel) }, "Drain…")
        this.close = make("button", { type: "button", class: "danger", onclick: () => close(this.tunnel) }, "Close…")
        this.buttons = make("div", { class: "buttons" }, this.drain, this.close)
        this.total = make("h3", {}, "Visitors")
        this.none = make("p", { class: "empty" })
        this.table = new Table({
            caption: "Visitors of this tunnel",
            key: visitor => visitor.visitor,
            sort: "Traffic",
            down: true,
            columns: [
                { title: "Visitor", class: "name", sort: visitor => visitor.visitor, text: visitor => visitor.visitor },
                { title: "Traffic", number: true, sort: visitor => visitor.rate_up + visitor.rate_down, text: visitor => rate(visitor.rate_up + visitor.rate_down) },
                { title: "Up", number: true, sort: visitor => visitor.up, text: visitor => size(visitor.up) },
                { title: "Down", number: true, sort: visitor => visitor.down, text: visitor => size(visitor.down) },
                { title: "For", number: true, class: "wide", sort: visitor => visitor.age ?? 0, text: visitor => visitor.age === undefined ? "–" : duration(visitor.age) },
                { title: "", class: "does", node: get => this.actions(get) },
            ],
        })
        this.events = eventTable("Events of this tunnel", false)
        this.eventsTitle = make("h3", {}, "Events")
        this.node = make("section", { "aria-labelledby": "title-tunnel", class: "one" },
            make("p", { class: "back" }, make("a", { href: "#tunnels" }, "← Tunnels")),
            make("div", { class: "tools" }, this.title, this.phase, this.buttons),
            this.facts, this.total, this.table.node, this.none, this.eventsTitle, this.events.node)
    }

    get tunnel() {
        return live.tunnels.get(this.id)
    }

    actions(get) {
        if (!mayChange()) return make("span")
        const name = get().visitor, host = name.replace(/:\d+$/, "").replace(/^\[|\]$/g, "")
        const button = (text, run) => make("button", { type: "button", class: "small", "aria-label": `${text} ${name}`, onclick: run }, text)
        const may = live.hello.role === "admin" && /^[\d.]+$|:/.test(host)
        return make("span", { class: "pair" }, button("Kick", () => kick(this.tunnel, name)), may ? button("Ban", () => ban(host)) : null)
    }

    update() {
        const { tunnel } = this
        this.buttons.hidden = !tunnel || !mayChange()
        this.drain.disabled = tunnel?.phase === "draining"
        const visitors = tunnel && live.visitors?.id === this.id ? live.visitors : null
        if (tunnel) {
            setText(this.title, tunnel.name ?? tunnel.id)
            this.phase.update(tunnel)
            this.link ??= address(publicAddress(tunnel))
            fill(this.facts, this.described(tunnel))
        } else if (live.state === "live") {
            this.phase.update({ phase: "closed" })
            fill(this.facts, [])
        }
        setText(this.total, visitors && visitors.total > visitors.rows.length ? `Visitors: ${visitors.rows.length} busiest of ${number(visitors.total)}` : "Visitors")
        this.table.update(visitors?.rows ?? [])
        setText(this.none, !tunnel ? "This tunnel is not open." : visitors ? "No visitors at the moment." : "…")
        this.none.hidden = Boolean(visitors?.rows.length)
        const events = live.events.filter(event => event.id === this.id).slice(0, 20)
        this.events.update(events)
        this.eventsTitle.hidden = !events.length
    }

    described(tunnel) {
        return [
            ["Public address", this.link],
            ["Owner", owner(tunnel)],
            ["Opened from", tunnel.owner.split("@").slice(1).join("@")],
            ["Backend", tunnel.backend],
            ["Id", tunnel.id],
            ["Visitors", `${number(tunnel.visitors)} of ${number(tunnel.max_visitors)}` + (tunnel.waiting ? `, ${tunnel.waiting} waiting` : "")],
            ["Served", number(tunnel.served)],
            ["Refused", tunnel.refused ? refusals(tunnel.refusals) || number(tunnel.refused) : "–"],
            ["Rate up, down", `${rate(tunnel.rate_up)}, ${rate(tunnel.rate_down)}`],
            ["Volume up, down", `${size(tunnel.up)}, ${size(tunnel.down)}`],
            ["Open for", duration(age(tunnel))],
            ["Limits", ["bandwidth", "quota", "visitor_rate", "max_per_source", "allow_from", "deny_from"].filter(key => tunnel[key] !== undefined).map(key => limit(key, tunnel[key])).join(", ")],
            ["Certificate", tunnel.certificate ?? null],
        ]
    }
}
