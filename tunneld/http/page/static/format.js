// Numbers, times and commands as `tunnel` prints them.

const UNITS = ["KiB", "MiB", "GiB", "TiB", "PiB"]

export function size(bytes) {
    let number = bytes, unit = "B"
    for (const larger of UNITS) {
        if (number < 1023.5) break
        number /= 1024
        unit = larger
    }
    return `${unit !== "B" && number < 9.95 ? number.toFixed(1) : number.toFixed(0)} ${unit}`
}

export const rate = bytes => bytes ? `${size(bytes)}/s` : "–"
export const number = value => (value ?? 0).toLocaleString("en")
export const plural = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`

export function duration(seconds) {
    const two = value => String(Math.floor(value)).padStart(2, "0")
    const total = Math.max(0, Math.floor(seconds)), minutes = Math.floor(total / 60)
    if (total >= 86400) return `${Math.floor(total / 86400)}d${two(total / 3600 % 24)}h`
    if (total >= 3600) return `${Math.floor(total / 3600)}h${two(minutes % 60)}m`
    return minutes ? `${minutes}m${two(total % 60)}s` : `${total}s`
}

export const clock = time => new Date(time).toLocaleTimeString("en-GB")

// The command of a terminal that does the same; a word is quoted as sh(1) needs it.
export const command = (...words) => ["tunnel", ...words].map(quoted).join(" ")
const quoted = word => /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`

// "rate:12,address:3" of the relay: what refused visitors.
const REASONS = {
    address: "address not allowed",
    per_source: "too many from one address",
    rate: "too fast from one address",
    full: "tunnel full",
    header: "no PROXY header",
    denied: "refused by control.authorize",
    unserved: "no answer from the agent",
}
export const refusals = text => (text ?? "").split(",").filter(Boolean).map(part => {
    const [kind, count] = part.split(":")
    return `${number(Number(count))} ${REASONS[kind] ?? kind}`
}).join(", ")
