// A table whose rows stay in place while their contents change, so that focus and selection survive.
//
// columns: [{ title, text: row => "...", node: get => element, number: true, sort: row => value, class: "wide" }]
// A column has `text`, or `node`, which is made once for each row and may read the row with `get()` later on.

import { make, setText } from "./dom.js"

const MAX_ROWS = 500

export class Table {
    #columns
    #key
    #rows = new Map()  // by key: { row, tr, cells }
    #order = { column: null, down: false }
    #latest = []

    constructor({ caption, columns, key, sort = null, down = false }) {
        this.#columns = columns
        this.#key = key
        this.#order = { column: columns.find(column => column.title === sort) ?? null, down }
        this.body = make("tbody", { role: "rowgroup" })
        this.more = make("p", { class: "more", hidden: true })
        const heads = columns.map(column => this.#head(column))
        // Roles are given, since a narrow page lays rows out as blocks, which are no table to a screen reader.
        this.table = make("table", { role: "table" }, make("caption", { class: "unseen" }, caption),
            make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)), this.body)
        this.node = make("div", { class: "sheet" }, this.table, this.more)
        this.#markOrder()
    }

    // Show these rows. Without any, the caller shows something else.
    update(rows) {
        this.#latest = rows
        const { column, down } = this.#order
        const sorted = column ? [...rows].sort((one, other) => compare(column.sort(one), column.sort(other)) * (down ? -1 : 1)) : rows
        const shown = sorted.slice(0, MAX_ROWS), keys = new Set(shown.map(this.#key)), focused = document.activeElement
        for (const [key, { tr }] of this.#rows) {
            if (!keys.has(key)) {
                tr.remove()
                this.#rows.delete(key)
            }
        }
        shown.forEach((row, index) => {
            const tr = this.#updated(row)
            if (this.body.children[index] !== tr) this.body.insertBefore(tr, this.body.children[index] ?? null)
        })
        if (focused !== document.activeElement && this.body.contains(focused)) focused.focus({ preventScroll: true })
        this.more.hidden = rows.length <= MAX_ROWS
        setText(this.more, `${MAX_ROWS} of ${rows.length} shown; filter to see others`)
        this.node.hidden = rows.length === 0
    }

    // Move the focus to the row above (-1) or below (1).
    step(by) {
        const links = [...this.body.querySelectorAll("tr")].map(tr => tr.querySelector("a, button")).filter(Boolean)
        const here = links.findIndex(link => link.closest("tr").contains(document.activeElement))
        links[here < 0 ? 0 : Math.min(links.length - 1, Math.max(0, here + by))]?.focus()
    }

    #updated(row) {
        const key = this.#key(row)
        let entry = this.#rows.get(key)
        if (!entry) {
            entry = { row }
            entry.cells = this.#columns.map(column => {
                const cell = make("td", { role: "cell", class: classes(column), "data-title": column.title })
                if (column.node) cell.append(column.node(() => entry.row))
                return cell
            })
            entry.tr = make("tr", { role: "row" }, ...entry.cells)
            this.#rows.set(key, entry)
        }
        entry.row = row
        this.#columns.forEach((column, index) => {
            const cell = entry.cells[index]
            if (column.text) setText(cell, column.text(row))
            else cell.firstChild?.update?.(row)
            if (column.mark) cell.dataset.mark = column.mark(row)
        })
        return entry.tr
    }

    #head(column) {
        const cell = make("th", { role: "columnheader", scope: "col", class: classes(column) })
        if (column.sort) {
            cell.append(make("button", { type: "button", onclick: () => this.#sortBy(column) }, column.title))
        } else {
            cell.append(column.title)
        }
        column.head = cell
        return cell
    }

    #sortBy(column) {
        const { column: before, down } = this.#order
        this.#order = { column, down: column === before ? !down : Boolean(column.number) }
        this.#markOrder()
        this.update(this.#latest)
    }

    #markOrder() {
        for (const column of this.#columns) {
            if (column !== this.#order.column) column.head.removeAttribute("aria-sort")
            else column.head.setAttribute("aria-sort", this.#order.down ? "descending" : "ascending")
        }
    }
}

const classes = column => [column.number ? "number" : "", column.class ?? ""].join(" ").trim()

function compare(one, other) {
    if (typeof one === "number" && typeof other === "number") return one - other
    return String(one).localeCompare(String(other), "en", { numeric: true })
}
