"""How are bytes read, written, proved and put in place, and viewed as tensors?"""
