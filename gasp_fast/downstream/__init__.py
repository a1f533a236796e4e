"""The paper's benchmarks, through lmms-eval in an environment of its own: suites, runs, scores, tables and figures.

suites.py        the benchmarks: their tasks in lmms-eval, their data, frames and pixels, and how a score is a mean
environment.py   finds lmms-eval's environment; data.py finds the data of the tasks
answers.py       lets a model and its base answer the tasks, in lmms-eval's environment; resumes
scores.py        scores and paired intervals, from lmms-eval's verdicts on the answers
results.py       results.json; tables.py: tables.md and index.html
comparison.py    several results: the generalisation gap, PCK beside benchmark means
lmms/            what lmms-eval loads: it imports nothing of gasp_fast
"""
