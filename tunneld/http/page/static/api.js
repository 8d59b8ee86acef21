// Requests to the relay. The token is half of the session: this page sends it, no other can read it.

const KEY = "tunneld-token"

export class Refused extends Error {}

export function remember(token) {
    localStorage.setItem(KEY, token)
}

export function headers(more = {}) {
    const token = localStorage.getItem(KEY)
    return token ? { ...more, "X-Tunneld-Token": token } : more
}

// The session is over, or this page never had one.
export function logInAgain() {
    localStorage.removeItem(KEY)
    location.replace("/?login" + location.hash)
}

async function post(path, content) {
    let response
    try {
        const body = JSON.stringify(content)
        response = await fetch(path, { method: "POST", headers: headers({ "Content-Type": "application/json" }), body })
    } catch {
        throw new Refused("the relay cannot be reached")
    }
    if (response.ok) return response
    const text = await response.text()
    let problem = text.split("\n")[1] || text  // "403 Forbidden", then why
    try {
        problem = JSON.parse(text).detail
    } catch { /* plain text */ }
    throw Object.assign(new Refused(problem), { status: response.status })
}

// Execute a verb of tunneld-control(7): {text, items}.
export async function call(verb, ...args) {
    try {
        return await (await post(`/api/v1/${verb}`, { args })).json()
    } catch (error) {
        if (error.status === 401) logInAgain()
        throw error
    }
}

export const logIn = async (name, secret) => (await post("/page/login", { name, secret })).json()

export async function logOut() {
    await post("/page/logout", {}).catch(() => null)
    logInAgain()
}
