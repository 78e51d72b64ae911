"""What a model is worth: each file has one class whose objects are called as ``evaluator(model)``.

They return {name: value}, numbers or lists of numbers, and see the averaged parameters in evaluation mode.
"""
