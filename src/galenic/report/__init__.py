"""Room 8: one page that shows how a run went.

In: the step folders of a run, any of them missing. Out: `report.html`, one file with everything inside it: no
network, no scripts, readable on a phone, in the dark and on paper.

    step folders --inputs--> plain dictionaries --sections--> tables and sentences --+
                                     |                                               +--template.html--> report.html
                                     +----------charts--> SVG in the page's colours -+

Beside it, `merge_page` and `flatten_page` write the page that lies beside every merged or flattened model; they draw by
`svg`, without a library, and share `page` with the report.

`inputs` reads, `sections`, `scores` and `summary` compute what is shown, `charts` draws, `template.html` lays out,
`report` is the verb. The same inputs give the same bytes.
"""
