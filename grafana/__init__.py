"""What Prometheus and Grafana are given: rules, provisioning, dashboards as code."""
