// The page: a live list, one request in detail, and what can be done with it.

import { bodyOf, durationOf, element, fieldsOf, framesOf, sizeOf, timeOf } from "./bodies.js"

const COUNTED = new Set(["content-length", "connection", "transfer-encoding", "keep-alive"]) // made again by a replay
const REFRESH = 250, TOAST = 2500, TYPING = 250
const by = id => document.getElementById(id)
const rows = new Map() // by id: { row, node }
let selected = null, shown = null, events = null, reveal = false, refreshTimer = null, replayOf = null, toastTimer = null

// Requests to the agent

async function ask(path, options) {
    const answer = await fetch(path, options)
    if (!answer.ok) throw new Error((await answer.text()).trim() || `status ${answer.status}`)
    return answer
}
const post = (path, value) =>
    ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) })

function parameters(more = {}) {
    const made = new URLSearchParams(more)
    if (by("query").value.trim()) made.set("q", by("query").value.trim())
    if (reveal) made.set("reveal", "1")
    return made
}
const revealing = () => reveal ? "?reveal=1" : ""

// The list

async function listen() {
    events?.close()
    problem("")
    const query = parameters()
    by("har").href = `api/har?${query}`
    if (query.has("q")) {
        try { await ask(`api/check?${query}`) } catch (error) { problem(error.message); return }
    }
    events?.close() // of another search that was begun meanwhile
    events = new EventSource(`api/events?${query}`)
    events.onopen = () => link("live", "live")
    events.onerror = () => link("lost", events.readyState === EventSource.CLOSED ? "open the new link that the agent has printed" : "the agent does not answer")
    events.addEventListener("reset", () => { rows.clear(); by("list").replaceChildren(); showEmpty() })
    events.addEventListener("rows", event => { JSON.parse(event.data).forEach(putRow); showEmpty() })
    events.addEventListener("gone", event => { JSON.parse(event.data).forEach(removeRow); showEmpty() })
    events.addEventListener("state", event => showState(JSON.parse(event.data)))
}

function link(state, text) {
    by("link").className = `link ${state}`
    by("link").firstElementChild.textContent = text
    by("link").title = text
}

function showState(state) {
    const parts = [`${state.count} kept`, `${sizeOf(state.kept)} of ${sizeOf(state.memory)}`]
    if (state.dropped) parts.push(`${state.dropped} older ones dropped`)
    if (state.unseen) parts.push(`${state.unseen} connections not shown: too many at once`)
    const names = Object.entries(state.exposures).map(([name, url]) => name === url.replace("http://", "") ? url : `${name} → ${url}`)
    document.body.classList.toggle("several", names.length > 1)
    by("state").textContent = [...names, ...parts].join(" · ")
}

function showEmpty() {
    by("empty").hidden = rows.size > 0
    by("empty").querySelector(".empty-title").textContent = by("query").value.trim() ? "No request matches" : "No requests yet"
}

function putRow(row) {
    const known = rows.get(row.id)
    const node = known?.node ?? element("div", { class: "row", role: "option", id: `row-${row.id}`, onclick: () => select(row.id) })
    node.replaceChildren(...cellsOf(row))
    rows.set(row.id, { row, node })
    node.setAttribute("aria-selected", row.id === selected)
    if (!known) {
        let before = by("list").firstElementChild
        while (before && Number(before.id.slice(4)) > row.id) before = before.nextElementSibling
        by("list").insertBefore(node, before)
        if (row.replay_of !== null && row.replay_of === replayOf) { replayOf = null; select(row.id) }
    }
    if (row.id === selected) refreshSoon()
}

function cellsOf(row) {
    const path = element("span", { class: "path", title: row.target }, row.target || row.note)
    path.append(element("span", { class: "tag exposure" }, row.exposure))
    if (row.upgrade) path.append(element("span", { class: "tag" }, row.upgrade === "websocket" ? `WebSocket, ${row.frames} frames` : row.upgrade))
    if (row.replay_of !== null) path.append(element("span", { class: "tag replay" }, "replay"))
    if (row.note && row.target) path.append(element("span", { class: "tag note", title: row.note }, "incomplete"))
    return [
        element("span", { class: "method" }, row.method || "—"), path, statusOf(row),
        element("span", { class: "number" }, row.upgrade && row.duration === null ? "open" : durationOf(row.duration)),
        element("span", { class: "number" }, sizeOf(row.size)),
        element("span", { class: "number" }, timeOf(row.began)),
    ]
}

function statusOf(row) {
    const text = row.status ?? (row.duration === null ? "…" : "none")
    return element("span", { class: `status s${row.status ? Math.floor(row.status / 100) : 0}` }, String(text))
}

function removeRow(id) {
    rows.get(id)?.node.remove()
    rows.delete(id)
}

function mark(before) {
    rows.get(before)?.node.setAttribute("aria-selected", false)
    rows.get(selected)?.node.setAttribute("aria-selected", true)
    if (rows.has(selected)) by("list").setAttribute("aria-activedescendant", `row-${selected}`)
    else by("list").removeAttribute("aria-activedescendant")
}

// One request

function select(id) {
    if (location.hash !== `#${id}`) location.hash = id
    else showSelected()
}

function showSelected() {
    const before = selected
    selected = Number(location.hash.slice(1)) || null
    document.body.classList.toggle("chosen", selected !== null)
    mark(before)
    rows.get(selected)?.node.scrollIntoView({ block: "nearest" })
    if (selected !== null) refresh()
    else { shown = null; nothing("Nothing selected", "Choose a request: j and k move, ? shows all keys.") }
}

function refreshSoon() {
    refreshTimer ??= setTimeout(() => { refreshTimer = null; refresh() }, REFRESH)
}

async function refresh() {
    const id = selected
    if (id === null) return
    try {
        const exchange = await (await ask(`api/exchanges/${id}${revealing()}`)).json()
        if (id === selected) showExchange(exchange)
    } catch (error) {
        if (id === selected) { shown = null; nothing("Not there any more", error.message) }
    }
}

function nothing(title, text) {
    by("detail").replaceChildren(backButton(), element("div", { class: "empty" }, element("p", { class: "empty-title" }, title), element("p", {}, text)))
}
const backButton = () => element("button", { id: "back", type: "button", onclick: back }, "← All requests")
const back = () => { location.hash = "" }

function showExchange(exchange) {
    const same = shown?.id === exchange.id, scrolled = by("detail").scrollTop
    const bodies = [...by("detail").querySelectorAll(".body, .frames")].map(place => place.scrollTop)
    shown = exchange
    by("detail").replaceChildren(...partsOf(exchange))
    if (!same) { by("detail").scrollTop = 0; return }
    by("detail").scrollTop = scrolled // the same one, with more of it
    by("detail").querySelectorAll(".body, .frames").forEach((place, index) => { place.scrollTop = bodies[index] ?? 0 })
}

function partsOf(exchange) {
    const { request, response } = exchange
    const parts = [
        backButton(),
        element("div", { class: "title" }, element("span", { class: "method" }, exchange.method || "—"),
            element("span", { class: "target" }, exchange.target || "a connection that is not HTTP"), exchange.method ? statusOf(exchange) : ""),
        factsOf(exchange),
    ]
    if (request) parts.push(actionsOf(exchange))
    if (exchange.note) parts.push(element("p", { class: "notice" }, exchange.note))
    if (exchange.upgrade === "websocket") {
        const older = exchange.frames - exchange.shown_frames.length
        const hint = `${exchange.frames} in all` + (older ? `, the newest ${exchange.shown_frames.length} are kept` : "")
        parts.push(element("section", { class: "card" }, element("h2", {}, "Frames", element("span", { class: "hint" }, hint)), framesOf(exchange)))
    }
    const link = `api/exchanges/${exchange.id}`, hasBodies = !exchange.upgrade
    if (request) parts.push(cardOf("Request", [`HTTP/${request.version}`], request, `${link}/request`, hasBodies))
    if (response) parts.push(cardOf("Response", [statusOf(exchange), response.reason], response, `${link}/response`, hasBodies))
    return parts
}

function factsOf(exchange) {
    const facts = [["at", timeOf(exchange.began)], ["took", exchange.duration === null ? "not over" : durationOf(exchange.duration)]]
    if (exchange.wait !== null) facts.push(["first byte after", durationOf(exchange.wait)])
    facts.push(["visitor", exchange.visitor], ["exposure", exchange.exposure])
    if (exchange.host) facts.push(["host", exchange.host])
    if (exchange.interim.length) facts.push(["interim", exchange.interim.join(", ")])
    const made = element("div", { class: "facts" }, ...facts.map(([name, value]) => element("span", {}, `${name} `, element("b", {}, value))))
    if (exchange.replay_of !== null) made.append(element("span", {}, "replay of ", element("a", { href: `#${exchange.replay_of}` }, `request ${exchange.replay_of}`)))
    return made
}

function actionsOf(exchange) {
    const button = (text, key, action, kind) => element("button", { type: "button", class: kind ?? "", onclick: action }, text, element("kbd", {}, key))
    const replay = exchange.upgrade ? [] : [button("Replay", "r", replayNow, "primary"), button("Edit and replay", "e", edit)]
    return element("div", { class: "actions" }, ...replay, button("Copy as curl", "c", copy),
        element("a", { class: "button", href: `api/har?${new URLSearchParams({ id: exchange.id, ...(reveal ? { reveal: "1" } : {}) })}`, download: "" }, "HAR"))
}

function cardOf(title, hints, message, link, hasBodies) {
    const hasBody = hasBodies && (message.size > 0 || message.note)
    if (hasBodies && !hasBody) hints = [...hints, message.is_open ? "no body yet" : "no body"]
    const fields = element("details", { open: true }, element("summary", {}, `Headers (${message.headers.length})`), fieldsOf(message.headers))
    const key = `open-${title}`
    fields.open = sessionStorage.getItem(key) !== "no"
    fields.addEventListener("toggle", () => sessionStorage.setItem(key, fields.open ? "yes" : "no"))
    const made = element("section", { class: "card" }, element("h2", {}, title, ...hints.filter(Boolean).map(hint => element("span", { class: "hint" }, hint))), fields)
    if (hasBody) made.append(...bodyOf(message, link))
    if (message.trailers.length) made.append(element("details", { open: true }, element("summary", {}, "Trailers"), fieldsOf(message.trailers)))
    return made
}

// Actions

async function replayNow() {
    if (!shown?.request || shown.upgrade) return
    try { await replay({ id: shown.id }) } catch (error) { toast(error.message) }
}

async function replay(wanted) {
    replayOf = wanted.id
    toast("Sent to the local server")
    try { await post("api/replay", wanted) } catch (error) { replayOf = null; throw error }
}

async function copy() {
    if (!shown?.request) return
    try {
        const text = await (await ask(`api/exchanges/${shown.id}/curl${revealing()}`)).text()
        if (navigator.clipboard) await navigator.clipboard.writeText(text)
        else copyOldWay(text)
        toast(reveal ? "Copied as curl" : "Copied as curl; secrets are redacted")
    } catch (error) { toast(`Not copied: ${error.message}`) }
}

function copyOldWay(text) { // a page over plain HTTP from another machine has no clipboard
    const place = element("textarea", { class: "unseen" })
    place.value = text
    document.body.append(place)
    place.select()
    const done = document.execCommand("copy")
    place.remove()
    if (!done) throw new Error("this browser does not permit it")
}

function edit() {
    if (!shown?.request || shown.upgrade) return
    const { request } = shown
    by("edit-method").value = shown.method
    by("edit-target").value = shown.target
    by("edit-headers").value = request.headers.filter(([name]) => !COUNTED.has(name.toLowerCase())).map(([name, value]) => `${name}: ${value}`).join("\n")
    const isText = request.text !== null
    by("edit-body").value = by("edit-body").defaultValue = isText ? request.text : ""
    by("edit-note").textContent = !isText ? "(not text: sent as it was unless you write something here)" : request.note
    by("edit-problem").hidden = true
    by("editor").dataset.id = shown.id
    by("editor").showModal()
    by("edit-target").focus()
}

async function sendEdited() {
    const lines = by("edit-headers").value.split("\n").filter(line => line.trim())
    let headers = lines.map(line => { const at = line.indexOf(":"); return at < 0 ? [line, ""] : [line.slice(0, at), line.slice(at + 1)] })
    const wanted = { id: Number(by("editor").dataset.id), method: by("edit-method").value.trim(), target: by("edit-target").value.trim() }
    if (by("edit-body").value !== by("edit-body").defaultValue) {
        wanted.text = by("edit-body").value
        headers = headers.filter(([name]) => name.trim().toLowerCase() !== "content-encoding")
    }
    by("edit-send").disabled = true
    try { await replay({ ...wanted, headers }); by("editor").close() }
    catch (error) { by("edit-problem").textContent = error.message; by("edit-problem").hidden = false }
    finally { by("edit-send").disabled = false }
}

function toast(text) {
    by("toast").textContent = text
    by("toast").hidden = false
    clearTimeout(toastTimer)
    toastTimer = setTimeout(() => { by("toast").hidden = true }, TOAST)
}

function problem(text) {
    by("problem").textContent = text
    by("problem").hidden = !text
}

function setReveal(value) {
    reveal = by("reveal").checked = value
    listen()
    refresh()
}

// Keys

function move(step) {
    const nodes = [...by("list").children], at = nodes.findIndex(node => node.id === `row-${selected}`)
    const next = nodes[at < 0 ? 0 : Math.max(0, Math.min(nodes.length - 1, at + step))]
    if (next) select(Number(next.id.slice(4)))
}

const KEYS = {
    j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
    g: () => move(-Infinity), G: () => move(Infinity), Home: () => move(-Infinity), End: () => move(Infinity),
    "/": () => by("query").select(), r: replayNow, e: edit, c: copy, s: () => setReveal(!reveal), "?": () => by("help").showModal(),
    Escape: back, Enter: () => by("detail").focus(),
}

document.addEventListener("keydown", event => {
    const isTyping = event.target.matches("input:not([type=checkbox]), textarea")
    if (by("editor").open && event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); sendEdited(); return }
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return
    if (isTyping) { if (event.key === "Escape" || event.key === "Enter") event.target.blur(); return }
    const isArrow = event.key.startsWith("Arrow") || event.key === "Home" || event.key === "End"
    if (isArrow && event.target.closest(".body, .frames, .detail:focus")) return // they scroll
    if (event.key === "Enter" && event.target.matches("button, a, summary, input")) return
    if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key]() }
})

let typing = null
by("query").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(listen, TYPING) })
by("search").addEventListener("submit", event => event.preventDefault())
by("reveal").addEventListener("change", () => setReveal(by("reveal").checked))
by("clear").addEventListener("click", () => post("api/clear", {}).catch(error => toast(error.message)))
by("help-open").addEventListener("click", () => by("help").showModal())
by("editor-form").addEventListener("submit", event => { event.preventDefault(); sendEdited() })
by("edit-cancel").addEventListener("click", () => by("editor").close())
window.addEventListener("hashchange", showSelected)
listen()
showSelected()
