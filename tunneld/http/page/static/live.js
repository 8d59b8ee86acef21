// What the relay sends: one stream for this page, only while it is visible, again after every interruption.

import { headers, logInAgain } from "./api.js"

const SILENCE = 20_000  // ms without a message, which should come every two seconds, after which a stream is dead
const MAX_PAUSE = 10_000
const EVENTS = 500

export const live = {
    hello: {},
    status: null,
    tunnels: new Map(),  // by id
    total: 0,
    visitors: null,  // of the tunnel that is open
    events: [],  // the latest first
    state: "waiting",  // "live", "waiting", "paused"
}

let changed = () => null, open = "", lastEvent = "", stream = null, woken = () => null, pause = 1000

export function start(onChange) {
    changed = onChange
    document.addEventListener("visibilitychange", restart)
    addEventListener("online", restart)
    run()
}

// Also send the visitors of this tunnel; "" is none.
export function watch(tunnel) {
    if (tunnel === open) return
    open = tunnel
    live.visitors = null
    restart()
}

function restart() {
    pause = 1000
    stream?.abort()
    woken()
}

async function run() {
    for (;;) {
        if (document.hidden) {
            set("paused")
            await new Promise(resolve => { woken = resolve })
            continue
        }
        const ours = stream = new AbortController()
        try {
            await follow(ours)
        } catch (error) {
            if (error.status === 401) return logInAgain()
        }
        if (!ours.signal.aborted || ours.signal.reason === "silent") {
            set("waiting")
            await new Promise(resolve => { woken = resolve; setTimeout(resolve, pause) })
            pause = Math.min(MAX_PAUSE, pause * 2)
        }
    }
}

async function follow(ours) {
    let timer
    const alive = () => { clearTimeout(timer); timer = setTimeout(() => ours.abort("silent"), SILENCE) }
    alive()
    try {
        const more = lastEvent ? { "Last-Event-ID": lastEvent } : {}
        const path = `/page/stream?tunnel=${encodeURIComponent(open)}`
        const response = await fetch(path, { headers: headers(more), signal: ours.signal, cache: "no-store" })
        if (!response.ok) throw Object.assign(new Error(await response.text()), { status: response.status })
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
        for (let rest = ""; ;) {
            const { done, value } = await reader.read()
            if (done) return
            alive()
            const messages = (rest + value).split("\n\n")
            rest = messages.pop()
            messages.forEach(receive)
        }
    } finally {
        clearTimeout(timer)
    }
}

// "id: ...\nevent: ...\ndata: ..."
function receive(message) {
    const fields = Object.fromEntries(message.split("\n").map(line => {
        const colon = line.indexOf(": ")
        return [line.slice(0, colon), line.slice(colon + 2)]
    }))
    const data = JSON.parse(fields.data)
    lastEvent = fields.id ?? lastEvent
    if (fields.event === "hello") live.hello = data
    else if (fields.event === "snapshot") snapshot(data)
    else if (fields.event === "events") live.events = [...data.reverse(), ...live.events].slice(0, EVENTS)
    else if (fields.event === "end") return logInAgain()
    pause = 1000
    set("live")
}

function snapshot(data) {
    if (data.full) live.tunnels.clear()
    data.gone.forEach(id => live.tunnels.delete(id))
    data.tunnels.forEach(tunnel => live.tunnels.set(tunnel.id, tunnel))
    Object.assign(live, { status: data.status, total: data.total, visitors: data.visitors })
}

function set(state) {
    live.state = state
    changed()
}
