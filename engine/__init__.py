"""A fine-tuning engine: the recipe defines the mathematics, the machine only defines the speed.

torchrun -m engine.train            fine-tune (engine/train.py is the loop, to read and to copy)
python -m engine.evaluate runs/x    one pass over labelled data
python -m engine.predict runs/x     a file in, predictions with their ids out
"""
