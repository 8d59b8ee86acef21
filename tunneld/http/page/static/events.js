// Events of tunnels, the latest first.

import { make, setText } from "./dom.js"
import { clock, plural, size } from "./format.js"
import { live } from "./live.js"
import { Table } from "./table.js"

const KNOWN = new Set(["time", "event", "id", "from", "reason", "up", "down", "side"])

function details(event) {
    if (event.event === "lost") return `${plural(event.count, "event")} left out: too many at once`
    const volume = "up" in event ? `${size(event.up)} up, ${size(event.down)} down` : ""
    const rest = Object.entries(event).filter(([key]) => !KNOWN.has(key)).map(([key, value]) => `${key} ${value}`)
    return [event.reason, volume, ...rest].filter(Boolean).join(" · ")
}

export function eventTable(caption, withTunnel = true) {
    return new Table({
        caption,
        key: event => event,
        columns: [
            { title: "Time", class: "time", text: event => event.time ? clock(event.time) : "" },
            { title: "Event", class: "kind", text: event => event.event, mark: event => event.event },
            ...(withTunnel ? [{ title: "Tunnel", class: "tunnel", node: get => make("a", { href: `#tunnels/${get().id ?? ""}` }, live.tunnels.get(get().id)?.name ?? get().id ?? "") }] : []),
            { title: "From", class: "from", text: event => event.from ?? "" },
            { title: "Details", class: "details", text: details },
        ],
    })
}

export class Events {
    constructor() {
        this.table = eventTable("Events")
        this.filter = make("input", { id: "filter", type: "search", placeholder: "event, tunnel, address", autocomplete: "off", spellcheck: false, oninput: () => this.update() })
        this.count = make("p", { class: "count", role: "status" })
        this.empty = make("p", { class: "empty" }, "No events yet. Tunnels that open and close, and visitors that come and go, appear here.")
        this.node = make("section", { "aria-labelledby": "title-events" },
            make("div", { class: "tools" }, make("h2", { id: "title-events" }, "Events"), make("label", { for: "filter", class: "unseen" }, "Filter events"), this.filter, this.count),
            this.table.node, this.empty)
    }

    update() {
        const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean)
        const text = event => `${Object.values(event).join(" ")} ${live.tunnels.get(event.id)?.name ?? ""}`.toLowerCase()
        const found = live.events.filter(event => words.every(word => text(event).includes(word)))
        this.table.update(found)
        setText(this.count, words.length ? `${found.length} of ${live.events.length}` : "")
        this.empty.hidden = found.length > 0
    }
}
