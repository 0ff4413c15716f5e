"""Tools beside the training: certificate, plan, report, dashboards, rankings, and the command `rlhf-recipes`."""
