"""The report of a study: one page, as HTML with embedded figures and as Markdown with figures beside it.

`summary` computes every number, `content` puts them into blocks, and two renderers write the same blocks.
"""
