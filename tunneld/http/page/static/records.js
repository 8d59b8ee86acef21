// Bans, certificates and credentials: asked for when they are shown, after each change, and now and then.

import { ask, ban, note, pardon, unban } from "./actions.js"
import { call } from "./api.js"
import { make, setText } from "./dom.js"
import { command, duration, number } from "./format.js"
import { live } from "./live.js"
import { Table } from "./table.js"

const REFRESH = 10_000  // ms

class Records {
    #asked = 0

    // `tables`: [{ title, verb, table, empty }]; `tools`: buttons.
    constructor(id, title, tables, tools = []) {
        this.tables = tables
        this.node = make("section", { "aria-labelledby": `title-${id}` },
            make("div", { class: "tools" }, make("h2", { id: `title-${id}` }, title), ...tools))
        for (const one of tables) {
            one.none = make("p", { class: "empty" }, "…")
            this.node.append(...(one.title ? [make("h3", {}, one.title)] : []), one.table.node, one.none)
        }
    }

    update() {
        if (Date.now() - this.#asked > REFRESH) this.load()
    }

    async load() {
        this.#asked = Date.now()
        for (const { verb, table, none, empty } of this.tables) {
            try {
                const { items } = await call(verb)
                table.update(items)
                none.hidden = items.length > 0
                setText(none, empty)
            } catch (error) {
                none.hidden = false
                setText(none, error.message)
            }
        }
    }
}

const isAdmin = () => live.hello.role === "admin"

// A column with one button, for admins.
function button(title, label, run) {
    return { title: "", class: "does", node: get => isAdmin() ? make("button", { type: "button", class: "small", "aria-label": `${title} ${label(get())}`, onclick: () => run(get()) }, title) : make("span") }
}

export function bans() {
    const after = run => async row => { await run(row); await section.load() }
    const add = make("button", { type: "button", class: "main", onclick: after(() => ban("")), hidden: !isAdmin() }, "Ban…")
    const section = new Records("bans", "Bans", [{
        verb: "bans",
        empty: "No network is banned.",
        table: new Table({
            caption: "Banned networks",
            key: row => row.network,
            columns: [
                { title: "Network", class: "name", sort: row => row.network, text: row => row.network },
                { title: "Ends in", number: true, sort: row => row.left, text: row => duration(row.left) },
                button("Unban", row => row.network, after(row => unban(row.network))),
            ],
        }),
    }, {
        title: "Blocked after failed logins",
        verb: "penalties",
        empty: "No address is blocked after failed logins.",
        table: new Table({
            caption: "Blocked after failed logins",
            key: row => `${row.address} ${row.credential} ${row.scope}`,
            columns: [
                { title: "Address", class: "name", sort: row => row.address, text: row => row.address },
                { title: "Blocks", text: row => row.scope === "name" ? `logins as ${row.credential ?? "an unknown name"}` : "all connections" },
                { title: "Failures", number: true, sort: row => row.failures, text: row => number(row.failures) },
                { title: "Ends in", number: true, sort: row => row.left, text: row => duration(row.left) },
                button("Pardon", row => row.address, after(row => pardon(row.address))),
            ],
        }),
    }], [add])
    return section
}

const DAY = 86400

export function certificates() {
    return new Records("certificates", "Certificates", [{
        verb: "certificates",
        empty: "No certificates for host names. See CERTIFICATES in tunneld(8).",
        table: new Table({
            caption: "Certificates for host names",
            key: row => row.names,
            columns: [
                { title: "Names", class: "name", sort: row => row.names, text: row => row.names.replaceAll(",", ", ") },
                { title: "Days left", number: true, sort: row => row.expires ?? -1, text: row => row.expires === undefined ? "none yet" : row.expires < 0 ? "expired" : String(Math.floor(row.expires / DAY)),
                  mark: row => row.expires === undefined || row.expires < 7 * DAY ? "problem" : "" },
                { title: "Renewed in", number: true, class: "wide", sort: row => row.renews ?? 0, text: row => row.renews === undefined ? "–" : duration(row.renews) },
                { title: "Source", class: "wide", sort: row => row.source ?? "", text: row => row.source ?? "" },
                { title: "Owner", class: "wide", sort: row => row.owner ?? "", text: row => (row.owner ?? "").split("@")[0] },
                { title: "Failure", class: "details", text: row => row.failure ?? "" },
            ],
        }),
    }])
}

export function credentials() {
    const add = make("button", { type: "button", class: "main", onclick: addCredential, hidden: !isAdmin() }, "Add…")
    return new Records("credentials", "Credentials", [{
        verb: "credentials",
        empty: "No credentials: every client that can connect has all permissions.",
        table: new Table({
            caption: "Credentials",
            key: row => row.name,
            columns: [
                { title: "Name", class: "name", sort: row => row.name, text: row => row.name },
                { title: "Role", sort: row => row.role, text: row => row.role },
                { title: "Tunnels", number: true, sort: row => row.tunnels, text: row => number(row.tunnels) },
                { title: "Authenticates by", class: "wide", text: row => (row.proof ?? "").replace("verifier", "secret").replaceAll("_", " ").replaceAll(",", ", ") },
                { title: "Limits", class: "details", text: row => row.limits ?? "–" },
                button("Remove…", row => row.name, row => onRelay(`Remove ${row.name}?`, "Its tunnels are drained, and it cannot log in any more.", () => ["credential", "remove", row.name])),
            ],
        }),
    }], [add])
}

function addCredential() {
    const name = make("input", { id: "credential-name", value: "alice", spellcheck: false, autocomplete: "off" })
    const roles = ["user", "viewer", "admin"].map(role => make("option", {}, role))
    const role = make("select", { id: "credential-role" }, ...roles)
    const max = make("input", { id: "credential-max", type: "number", min: "1", placeholder: "no limit" })
    const words = () => ["credential", "add", name.value.trim() || "NAME", ...(role.value === "user" ? [] : ["--role", role.value]),
        ...(max.value ? ["--max-tunnels", max.value] : [])]
    const fields = [make("label", { for: "credential-name" }, "Name"), name, make("label", { for: "credential-role" }, "Role"), role,
        make("label", { for: "credential-max" }, "Tunnels at most"), max]
    onRelay("Add a credential", "It prints the secret, and the line for the other machine.", words, fields)
}

// Credentials are in a file that the relay may not write, and a new secret is best seen in one place only.
async function onRelay(title, text, words, fields = []) {
    const line = () => command(...words())
    const where = "Credentials are kept in tunnel.toml on the relay, which the daemon cannot write. Run the command there."
    if (await ask({ title, text: `${text} ${where}`, line, button: "Copy the command", fields, danger: false })) {
        await navigator.clipboard?.writeText(line())
        note("copied; run it on the relay", line())
    }
}
