"""The recipe protocol, the shipped recipes (flights, pictures) and what tables share."""
