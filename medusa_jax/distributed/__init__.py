"""Several devices: meshes, sharding rules, and compilers of machines that are not here."""
