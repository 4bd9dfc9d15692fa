"""``python -m gradclip lab``: every remedy for exploding gradients, put to the test.

Networks in plain NumPy, one training loop, on gradclip's public interface. Everything printed and plotted is
computed from the rows of runs. The first experiment is :mod:`gradclip._lab.demo`. Nothing outside of this
package imports it.
"""
