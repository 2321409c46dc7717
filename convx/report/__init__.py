"""Tables, figures and the front page of a study, all made from ``results/<study>`` alone."""
