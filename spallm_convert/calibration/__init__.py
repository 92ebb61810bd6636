"""Calibrated conversion: the text that a model is shown, so that its sketch errs where it may."""
