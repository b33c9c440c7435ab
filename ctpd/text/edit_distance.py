def edit_distance_pairing(student_tokens, teacher_tokens):
    raise NotImplementedError
