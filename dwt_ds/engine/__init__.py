"""Everything that uses DeepSpeed; no other package imports it."""

# What rank 0 of `collective_check` prints before its JSON. It is here, since whoever reads it does not load DeepSpeed.
COLLECTIVE_ANSWER = "dwt-ds collective: "
