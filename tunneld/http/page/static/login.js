import { logIn, remember } from "./api.js"
import { find } from "./dom.js"

find("host").textContent = location.host

find("form").addEventListener("submit", async event => {
    event.preventDefault()
    const submit = find("submit")
    submit.disabled = true
    find("problem").textContent = ""
    try {
        const { token } = await logIn(find("name").value.trim(), find("secret").value)
        remember(token)
        location.replace("/" + location.hash)
    } catch (error) {
        find("problem").textContent = error.message
        submit.disabled = false
        find("secret").select()
    }
})
