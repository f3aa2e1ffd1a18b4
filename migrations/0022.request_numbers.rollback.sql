-- Numbers go on from where they are.
select;
