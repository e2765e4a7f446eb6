"""Callbacks for the trainers of other libraries. Import only the module of the library in use.

Each module imports its own framework and the public names of wellcond, nothing else.
"""
