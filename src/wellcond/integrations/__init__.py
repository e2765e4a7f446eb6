"""Callbacks for the trainers of other libraries; import the module of the one in use.

Each sees its own framework and the public names of wellcond, nothing else.
"""
