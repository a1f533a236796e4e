"""Scenes, tracks and questions as arrays and files. Only `depth/monocular.py` uses torch.

A folder may import those below it in this list, never those above. `annotations` and `inspection` do not import each
other, nor do `tracks` and `depth`, nor `scenes` and `video`.

    synthetic     renders scenes with exact geometry, and questions about them
    questions     conversations about videos: LLaVA-Video's schema, and questions made from tracks
    annotations   tracks of all training sequences, computed once and stored in shards
    inspection    checks a scene's geometry and draws its tracks
    tracks        point tracks from depth; which frames form a training sequence
    depth         computes depth for scenes without; averages depth over patches
    scenes        photographs with cameras and depth, read from folders in several formats
    video         reads and writes video files

The modules beside them are `mixture` (interleaves data sources by weight), `permutation` (shuffles without a list),
`images` (opens image files), `compiled` (the C++ extensions) and `errors` (one-line messages).
"""
