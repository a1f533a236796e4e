"""Correspondence evaluation: does a layer of the model find a point of one frame again in another frame?

dataset          sequences of frames with query points and their true positions
evaluated_model  loads the model under evaluation, with its correspondence heads
features         one forward pass that gives a consumer each layer's features of the visual tokens
matching         the most similar token of another frame for each query point
predict          runs a batch of sequences and collects the predictions of each layer
predictions      the predictions of a sequence, and their files
metrics          PCK, confidence-accuracy correlation, PCK by temporal gap
evaluate         the whole evaluation, resumable
held_out         a few sequences, for a model that is being trained
report, tables, figures    report.json, index.html, tables and curves, for one report or several
report_check     checks a report.json that is not trusted
gallery, pictures          example sequences drawn on their frames
"""
