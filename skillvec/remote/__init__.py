"""How are files of the Hub and of object stores found, read and written?"""
