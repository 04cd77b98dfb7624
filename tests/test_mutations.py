from mutations import misplaced


def test_each_mutation_is_of_a_text_that_stands_once_in_its_file():
    assert misplaced() == []
