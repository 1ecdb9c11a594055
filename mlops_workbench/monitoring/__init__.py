"""The monitoring room: windows over the prediction log, service, quality, drift, alerts, reports."""
