"""Room 8: pages that show how a run went and how models compare, and the card of a model.

In: a run folder, or the step folders of one, any of them missing. Out: `report.html`, one file with everything inside
it: no network, no scripts, readable on a phone, in the dark, by a screen reader and on paper.

    run --steps--> step folders --inputs--> plain dictionaries --sections--> tables and sentences --+
                                                 |                                                  +--> report.html
                                                 +----------charts--> SVG and its numbers ----------+

`report` is the verb. `inputs` reads; `sections`, `learning`, `weights`, `alignment`, `scores`, `benchmarks`,
`failures`, `cost` and `summary` compute what is shown; `charts` and `score_charts` draw; `template.html` lays out, with
`macros.html`. `compare` and `versus` do the same for models side by side (`compare.html`), with the statistics of
`paired`. `cards` writes the card of a model folder, by `model_card`, which every saved model's card is from.

Beside it, `merge_page` and `flatten_page` write the page that lies beside every merged or flattened model; they draw by
`svg`, without a library, and share `page` with the report.

The same inputs give the same bytes.
"""
