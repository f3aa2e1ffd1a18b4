select floor.apply_next(:last);
