"""Numbers -> what people read: tables, claims, figures, costs."""
