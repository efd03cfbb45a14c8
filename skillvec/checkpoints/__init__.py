"""Which tensors does this folder or file hold, under the names of the model?"""
