"""Studies: compare methods fairly, from one YAML file to a report.

    lit-adapters study run STUDY.yaml        # search rates on validation data, train, test; goes on where it stopped
    lit-adapters study status STUDY.yaml     # what is done, and what is left
    lit-adapters study report STUDY.yaml     # report.html and report.md, also of an unfinished study

docs/studies.md explains the file and the statistics.
"""
