"""What makes an adapter's file serve itself: its model described and built again, its card, and the hub.

``libraries`` has the libraries of models by name, ``model_card`` writes the README, and ``hub`` uploads and downloads.
None of these knows an adapter's handle; they take a model, an :class:`~tnadapt.AdapterFile` or a path.
"""
