"""What a model knows of correspondence: measured, reported, pictured.

`sampling` draws the questions (frames and true point tracks), `features` taps a model while it runs, `matching` finds
each point again, `metrics` judges, `evaluate` ties these together and can be stopped and resumed, `report`, `figures`
and `pictures` show the result.
"""
