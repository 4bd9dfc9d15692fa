"""What reports are made of: tables, plots and pages that look alike.

The benchmark suite of the repository and ``gradclip._lab`` make theirs of it. Needs what those need, Jinja,
Matplotlib and Rich, so nothing else imports it.
"""
