"""Every mistake found before a rank starts: on this machine (`local`) and on the other nodes (`hosts`)."""
