"""Correspondence evaluation: does a layer of the model find a point of one frame again in another frame?

dataset          sequences of frames with query points and their true positions
evaluated_model  loads the model under evaluation, with its correspondence heads
features         one forward pass that gives a consumer each layer's features of the visual tokens
matching         the most similar token of another frame for each query point, in either direction
predict          runs a batch of sequences and collects the predictions of each layer
predictions      the predictions of a sequence, and their files
metrics          PCK, also of head groups, confidence-accuracy correlation, PCK by temporal gap
baselines        PCK of random and of constant predictions; how often a layer repeats an answer
position_error   TAP-Vid's share of points within a few pixels
evaluate         the whole evaluation, resumable
held_out         a few sequences, for a model that is being trained
report_content   all metrics, as they are in report.json
report, tables, figures    report.json, tables and curves, for one report or several
page, templates/           index.html
pointing, pointing_page    the part of it that shows where each layer looks for a token
paired           differences between reports on the same sequences, with a bootstrap interval
report_check     checks a report.json that is not trusted
"""
