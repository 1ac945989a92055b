"""What people read: tables, claims, appendix, figures and the cost plan."""
