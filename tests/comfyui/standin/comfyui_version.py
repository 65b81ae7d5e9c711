__version__ = "0.29.0 (a stand-in for tests)"
