"""SQuAD closed book by SEAL's protocol: passages learnt into weights, then asked about."""
