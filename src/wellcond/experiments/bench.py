def configure(parser):
    pass
